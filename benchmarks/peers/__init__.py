"""Tandem and the engines that a user could pick instead, on one machine in one run."""
