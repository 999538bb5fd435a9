"""The program mpo-export."""
