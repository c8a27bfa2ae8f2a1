from protomem.cli import main

main()
