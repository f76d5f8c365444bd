"""Text to rows of tokens (report 4.1). Knows no model.

`sources` reads documents, `held_out` divides them, `tokenizer` turns text into ids and back,
`tokenised` and `shards` hold documents as tokens in memory and on disk, `packing` lays whole
documents end to end and cuts rows, `mixture` takes rows from several sources, `loader` stacks rows
into batches and reads ahead; `corpus` puts them together. Each step is a function of its inputs
alone, so a batch is a function of (documents, tokenizer, seed, consumed rows).
"""
