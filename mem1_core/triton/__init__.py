"""The Triton backends, for CUDA devices from compute capability 8.0 on. Loaded by the first such call."""

import triton

from mem1_core.versions import warn_if_untested

warn_if_untested(triton)
