# cuda-bindings is for GPUs only: any name of its modules is there, of any type.
