from lavis_dcd.train import main

raise SystemExit(main())
