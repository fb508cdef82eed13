"""Measurements that are made elsewhere and come back as files."""
