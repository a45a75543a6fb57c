"""Native CPU kernels: C++ that is built with the user's compiler at first use, where torch has no fast operator."""
