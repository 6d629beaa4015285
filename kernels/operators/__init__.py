"""The fused operators: for each its schema, fake, reference and dispatch. Importing a module registers its operator."""
