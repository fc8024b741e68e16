"""Noisy fine-tuning, from a file to a model with better guesses: the steps of ``msn train``.

The engine is transformers' Trainer, the adapter PEFT's; what is added is :func:`msn_ext.add_noise`,
answers of the model itself, and figures before and after. A module a step:

- :mod:`.settings`: what can be chosen, for the command line, the other modules and benchmarks;
- :mod:`.samples`: conversations to training samples;
- :mod:`.self_distill`: answers of the model itself;
- :mod:`.metrics`: figures before and after;
- :mod:`.train`: the training.

Nothing is imported here, so that the command line can read the settings without torch.
"""
