"""What is measured on a model: one file per metric, `def METRIC(model, tokenizer, documents, *, parameters) -> dict`.

A metric asks for what it needs by naming it: `model`, `tokenizer`, `documents` (it then runs once per domain),
`base` (the recipe's folder), `progress` (wraps an iterable with a bar), `open_model` (the name of a model -> the loaded
model). A parameter `target` names another of the models that are measured. Its other keyword arguments are the
recipe's.
"""
