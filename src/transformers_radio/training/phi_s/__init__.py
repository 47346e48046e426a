"""PHI-S: standardizing teacher features by a Hadamard rotation."""
