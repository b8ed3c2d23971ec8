"""Tensors in files, which are read lazily and never without verifying the checksums that their files have.

Begin with `lazy`, what a lazy tensor is, then `extent`, which reads tensors' bytes and verifies them; `derived` has
tensors that are computed from others. `safetensors` and `torch_file` open the two kinds of files, `torch_file` with the
help of `unpickle`, which cannot run code. `pt_writer` and `torch_zip` write files that `torch.load` opens. May import
modules below `config` such as `reading` and `errors`: nothing here knows of models, configs or formats of checkpoints.
"""
