"""What a forward pass computes, as data: :mod:`.plan`, which :mod:`.families` read from models."""
