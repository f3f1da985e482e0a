"""What trainers and frameworks demand of an optimizer. Nothing here is imported by `import subspace_optim`."""
