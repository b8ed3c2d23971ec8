"""How much of a sequence the scans of Mamba and RWKV take at a time: known to them, and to the plan of their memory."""

# Values of a chunk's states; larger chunks take more memory and save little time.
CHUNK_VALUES = {"cpu": 1 << 19, "cuda": 1 << 25}
SCAN_TOKENS = 16  # of a group, in which RWKV's scan compares each with each


def scan_chunk(device: str, width: int) -> int:
    """Tokens of a chunk of RWKV's scan, whole groups; `width`: values that one token of all rows has."""
    values = CHUNK_VALUES.get(device, CHUNK_VALUES["cuda"])
    return max(1, values // (width * SCAN_TOKENS * SCAN_TOKENS)) * SCAN_TOKENS
