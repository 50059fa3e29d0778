from scaling_jax.cli.main import main

main()
