"""The bytes of the mean.

`buffers` and `value_kinds` recognise tensors that are no plain weights. `plan` gives every output tensor its rule,
dtype and offset, and `blocks` cuts the output into blocks. In `stream`, workers read a block from every checkpoint
(`checkpoint.tensor_reads`), average it and write it. `averager` averages one block on one of the `devices`;
`arithmetic` has the sums, the division and the rounding. `spectral_norm` computes what belongs to averaged weights.

`samples` tells by a few weights of each checkpoint whether one is far off. `compare` measures all of them: `gram` the
products of their differences from the mean, `geometry` the distances that follow, and `far_off` has the rules.
"""
