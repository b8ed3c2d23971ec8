"""How much of a sequence Mamba's scan takes at a time: known to the scan, and to the plan of its memory."""

# Values of a chunk's states; larger chunks take more memory and save little time.
CHUNK_VALUES = {"cpu": 1 << 19, "cuda": 1 << 25}
