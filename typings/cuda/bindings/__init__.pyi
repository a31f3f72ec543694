"""What pyright needs to know of cuda-bindings where it is not installed: nothing in particular."""
