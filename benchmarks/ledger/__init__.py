"""Ledgers: what they cost, and a simulation of many processes on one."""
