"""Triton kernels, imported as ``trifuse.triton_kernels``."""

if __name__ != "trifuse.triton_kernels":
    raise ImportError(
        "this folder is trifuse's source of trifuse.triton_kernels, not the distribution triton_kernels; "
        "import trifuse.triton_kernels, or take this folder's parent off sys.path"
    )
