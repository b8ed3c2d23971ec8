from castalia.cli.main import main

main()
