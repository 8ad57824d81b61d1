"""Trunks: the timm adapter and what timm lacks."""
