"""One file per op: schema, checks and error messages, fake implementation, autograd formula, choice of backend."""
