"""The files that DeepSpeed writes for NeoX and Megatron-DeepSpeed: `folder` opens them, `write` plans them."""
