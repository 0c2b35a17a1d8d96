"""Parts of the simulation of Simchoni & Rosset (2021, 2023): data, networks, methods and what the papers report."""
