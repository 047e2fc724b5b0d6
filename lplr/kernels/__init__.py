"""Operations on plain tensors, one folder each, with a torch reference beside every faster form."""
