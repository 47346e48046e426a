"""Checkpoints of others: conversion from and to the layouts of NVIDIA's releases, transformers and timm."""
