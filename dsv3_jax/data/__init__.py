"""Text to rows of tokens (report 4.1). Knows no model.

`sources` reads documents, `tokenizer` turns text into ids and back, `packing` lays whole documents
end to end and cuts rows, `loader` stacks rows into batches and reads ahead. Each step is a function
of its inputs alone, so a batch is a function of (documents, tokenizer, seed, consumed rows).
"""
