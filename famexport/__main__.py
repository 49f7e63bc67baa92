from famexport.cli import main

main()
