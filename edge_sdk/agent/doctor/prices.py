"""What is lost without the better one of two, as measured; each with its source. Only told.

Figures are those of the machine they were measured on; another's are in its own results.
"""

from __future__ import annotations

__all__ = ["ALLOCATOR", "DECODING", "LIMITED", "PACKING"]

ALLOCATOR = (
    "as the trainer has to set it, a step takes 1.34 times glibc's own time; mimalloc takes 0.92 of that own "
    "time and 0.92 of the peak, tcmalloc 0.94 and 0.83 (benchmarks/allocator, 2026-11-21, two cores of an "
    "AMD EPYC)"
)
LIMITED = (
    "it holds 1.03 times what the tensors take, and a step takes 1.12 times as long as under mimalloc, which "
    "holds 1.29 times (16 settings of a RoBERTa shape, two cores of an AMD EPYC, 2026-11-30)"
)
PACKING = (
    "composed operations pack: 3.1 million values at 8 bits in 17.5 ms where torch's FBGEMM kernels take "
    "1.7, at 4 bits in 20.0 where they take 3.4 (one thread of an AMD EPYC, 2026-11-25)"
)
DECODING = (
    "torch decodes NF4, to the same values: 16.8 million weights in 5.1 ms where bitsandbytes takes 2.4, and "
    "their product with 1024 rows 370 (one thread of a CPU with AVX-512)"
)
