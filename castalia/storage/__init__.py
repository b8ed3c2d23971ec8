"""Tensors in files: named, read when asked for, and never without the checksums that their files carry.

`tensor` has the lazy tensors, `extent` the one reader of bytes, `safetensors` and `torchfile` the two kinds of files;
`pt_writer` and `torchzip` write what `torch.load` opens.
"""
