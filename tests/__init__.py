"""Tests are a package: files mirror modules, so the same name may stand in several folders."""
