"""LoRA adapters as the library PEFT stores them, on a model of any format."""
