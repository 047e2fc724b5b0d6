"""Numerical linear algebra on plain tensors: sketches, range finders, projections, Hessians."""
