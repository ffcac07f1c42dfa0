"""Meta's Llama: consolidated.00.pth, the slices of one tensor-parallel rank."""

from ckpt_avg.formats.trainers.trainer import Trainer

TRAINER = Trainer(name="Meta Llama", part_files=(r"consolidated\.(?P<number>\d\d)\.(pth|pt|safetensors)",))
