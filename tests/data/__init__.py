"""Tests of kd.data; a package, because its conftest shares its name with the one above."""
