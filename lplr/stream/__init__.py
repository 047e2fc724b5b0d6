"""One block at a time: tensors are read lazily from a checkpoint, compressed, and committed shard by shard.

source      where weights come from (safetensors folders, GGUF files), under the names of the module tree
entries     one safetensors file, read defensively
shards      where they go: safetensors files and texts that appear whole or not at all
checkpoint  an input opened: config, model on meta, and the plan of every matrix
calibrate   the text, the inputs of each block, and the second moments of each layer's input
reconstruct each block tuned against the original one
distill     the whole model tuned against the original's predictions
compress    the driver
workers     who works on matrices: threads of this process
cluster     or tasks of a Ray cluster
meter       how far it is
ledger      run.jsonl: the identity of a run, what of it is finished, and the lock of its folder
finish      index, recipe, card, config.json and the checksums of a finished folder
verify      a finished folder against its records and its base model
estimate    what a run will take, from shapes alone
inspect     stable rank and energy of each matrix
neurons     MLPs with fewer neurons, a dense model from a dense one
device      where to compute
"""
