"""The sampled tests on each pair of torch and Triton that the README claims: ``nox``, ``nox -s torch-2.12.1``.

Arguments after ``--`` are pytest's, in place of the whole sample: ``nox -s torch-2.12.1 -- tests/ops -k mse``.
pip takes torch from wherever it is set up for; its CPU wheels, which are smaller, serve as well.
"""

import nox

nox.options.default_venv_backend = "uv|venv"
nox.options.error_on_missing_interpreters = False
SAMPLE = ("-m", "not full", "-n", "2", "--durations=15")


def pair(python: str, torch: str, triton: str, *others: str) -> None:
    """Make a session named by torch's version."""

    @nox.session(name=f"torch-{torch}", python=python)
    def tests(session: nox.Session) -> None:
        session.install(
            f"torch=={torch}", f"triton=={triton}", *others, "-e", ".[test]", "pip", "setuptools>=77"
        )
        session.run("python", "-m", "gradkernels", "info")
        session.run("python", "-m", "pytest", *(session.posargs or SAMPLE))


# The Triton that belongs to each torch; every Python that has wheels of both, once.
pair("3.12", "2.11.0", "3.6.0", "numpy<2.4")  # that Triton's interpreter needs it
pair("3.10", "2.12.1", "3.7.1")
pair("3.11", "2.13.0", "3.9.0")
pair("3.12", "2.14.1", "3.8.0")
pair("3.13", "2.15.0", "3.9.0")
