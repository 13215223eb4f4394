"""Class-incremental training of vision transformers, with Locality-Preserved Attention (LPA)."""
