"""Other people's checkpoints, read where they lie: stock DCP, safetensors, files of ``torch.save``.

Law: no torch, and nothing from storage is unpickled but by `pickles`. Reads only.
"""
