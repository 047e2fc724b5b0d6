"""One block at a time: tensors are read lazily from a checkpoint, compressed, and committed shard by shard.

source      where weights come from (safetensors folders, GGUF files), under the names of the module tree
entries     one safetensors file, read defensively
shards      where they go: safetensors files and texts that appear whole or not at all
"""
