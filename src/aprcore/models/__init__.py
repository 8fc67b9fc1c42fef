"""An open model: configuration, tokenizer and weights by canonical name; converting one."""
