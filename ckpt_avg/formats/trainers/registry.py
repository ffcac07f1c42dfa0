"""All trainers, in the order in which they are asked: a file is that of the first whose layout fits."""

from __future__ import annotations

from ckpt_avg.formats.trainers import (
    accelerate,
    composer,
    deepspeed,
    detectron2,
    espnet,
    fairseq,
    icefall,
    lightning,
    megatron,
    meta_llama,
    mmengine,
    nemo,
    opennmt,
    peft,
    timm,
    torch_averaged_model,
    torch_dcp,
    torchvision,
    transformers,
    ultralytics,
    wenet,
)

TRAINERS = (
    torch_dcp.TRAINER,
    transformers.TRAINER,
    lightning.TRAINER,
    mmengine.TRAINER,
    timm.TRAINER,
    opennmt.TRAINER,
    fairseq.TRAINER,
    icefall.TRAINER,
    ultralytics.TRAINER,
    torchvision.TRAINER,
    megatron.TRAINER,  # before detectron2, whose keys its files contain, too
    detectron2.TRAINER,
    composer.TRAINER,
    deepspeed.TRAINER,
    accelerate.TRAINER,
    peft.TRAINER,
    torch_averaged_model.TRAINER,
    espnet.TRAINER,
    wenet.TRAINER,
    nemo.TRAINER,
    meta_llama.TRAINER,
)
