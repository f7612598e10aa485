"""The Llama: blocks, attention, rotary, initialisation, loss, cache for generation, parameter and FLOP counts.

`llama.Llama` puts the rest together; `count` is arithmetic on the config and needs no torch.
"""
