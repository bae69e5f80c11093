"""The judge of kernels and gradients in a file that was not written for it: ``python -m gradkernels verify FILE``.

``command`` is the command, ``process`` the child process and its limits, ``child`` what runs in it. There ``load``
reads the file, ``points`` derives the inputs to try, ``subject`` calls the code under judgement and its reference,
``trials`` are the experiments, and ``examine`` puts them in order. ``verdict`` has the words, ``report`` the formats.
"""
