from lavis_dcd.evaluate import main

raise SystemExit(main())
