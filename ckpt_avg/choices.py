"""The values of options that have a few: types for signatures, from which the options take their choices."""

from __future__ import annotations

from typing import Literal

OutputDType = Literal["keep", "float64", "float32", "bfloat16", "float16"]
NonFloat = Literal["equal", "last"]
IO = Literal["auto", "mmap", "pread"]
BatchNormMode = Literal["auto", "refresh", "keep"]
Estimator = Literal["pooled", "batch-mean"]
AMP = Literal["off", "bfloat16", "float16"]
BestMode = Literal["min", "max"]
Windows = Literal["last", "first", "both"]
WeightingRule = Literal["mean", "linear", "minus-sqrt", "cosine", "ema", "power"]
WeightingBy = Literal["auto", "index", "step"]
