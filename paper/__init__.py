"""The paper's numbers as data, and the tables made from runs."""
