"""How many bytes of logits the loss holds at a time: facts that the model computes by and the plan counts with."""

CHUNK_BYTES = {
    "cpu": 64 << 20,
    "cuda": 512 << 20,
    "mps": 64 << 20,
}  # by device: of one chunk's logits, in the compute dtype
# By device: of the block of a chunk's logits that is in fp32 at a time. A CPU keeps 2 MiB in its cache.
BLOCK_BYTES = {"cpu": 2 << 20, "cuda": 128 << 20, "mps": 128 << 20}
