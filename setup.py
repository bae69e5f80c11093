from setuptools import find_packages, setup

setup(
    packages=[
        "gradkernels",
        *("gradkernels." + package for package in find_packages("kernels")),
        "gradkernels.bench",
        *("gradkernels.bench." + package for package in find_packages("bench")),
    ],
    py_modules=["pytest_gradkernels"],
)
