"""Healing: brief retraining of a compressed model against its dense teacher, from one processor to many devices."""
