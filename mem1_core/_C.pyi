def version() -> str: ...
def cuda_architectures() -> str: ...
def tile_plan_cuda(
    stream: int,
    batch: int,
    length: int,
    block_q: int,
    block_k: int,
    evict: int,
    key_ranges: int,
    full_offsets: int,
    full_tiles: int,
    partial_offsets: int,
    partial_tiles: int,
) -> None: ...
